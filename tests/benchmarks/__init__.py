"""What the library costs, beside a plain Python loop and beside other libraries.

``make bench`` measures and renews ``docs/explanation/performance.md``; ``make bench-quick`` shows
the same table in under a minute. Nothing here is collected by pytest.
"""
