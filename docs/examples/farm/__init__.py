"""The parts of the first run; begin with ``application``."""
