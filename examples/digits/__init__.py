"""The parts of demo_digits.py: data and net, training, measurements, the report."""
