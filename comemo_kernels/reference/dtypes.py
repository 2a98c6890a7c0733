"""Dtypes that operations accept."""

import torch

DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
INTEGERS = {torch.int32, torch.int64}
MASKS = DTYPES | INTEGERS | {torch.bool, torch.uint8, torch.int8, torch.int16}
FLOAT8 = torch.float8_e4m3fn
