"""The stages of benchmarks/on_gpu.py, what they record, and the page that shows it."""
