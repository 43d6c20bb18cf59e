"""Real brokers, real worker processes, kill -9."""
