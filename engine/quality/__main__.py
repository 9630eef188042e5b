import sys

from engine.quality.command import main

sys.exit(main())
