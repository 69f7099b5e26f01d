"""What all tests share: the folder of this file is importable (`import tiny`), and nothing reaches for the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
