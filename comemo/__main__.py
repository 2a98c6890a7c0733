import sys

from comemo.cli import main

sys.exit(main())
