"""What training and evaluation cost, beside a plain implementation: `python -m stages.bench`."""

# What takes turns, beside the quantization methods, as the rows of the results name it.
PLAIN, FULL, BFLOAT16 = "plain", "float32", "bfloat16"
