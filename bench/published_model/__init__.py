"""A stand-in for the published CoMemo code: its structure, names and arithmetic, written anew.

The published package cannot be installed: it has the name `comemo` and old requirements. The patch
of `comemo_kernels` recognises models by structure, so it is tested and timed on these modules.
`tests/test_published_model.py` compares them with recorded outputs of the published code.
They run on transformers 4.37 and later where they are constructed directly, as the published
modules do.
"""
