"""The recommenders; nothing here knows about quantization beyond naming the places where it may happen."""
