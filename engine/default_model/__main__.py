import sys

from engine.default_model.model import main

sys.exit(main())
