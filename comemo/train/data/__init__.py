"""Training data: from meta files and JSON lines to packs."""
