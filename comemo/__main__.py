import sys

from comemo.cli.main import main

sys.exit(main())
