"""Times the expert layer and its operators beside other implementations: `python -m benchmarks.run`."""
