"""What comparisons need: tiny pipelines, the peer with PEFT alone, counts of a step, predictions for GPUs.

The tests, the benchmarks and `benchmarks/roofline.py` take it from here; nothing of the library needs it.
"""
