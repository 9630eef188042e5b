from engine.host_process.host import main

main()
