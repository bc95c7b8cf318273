"""Is it right? What losses depend on, suspicions in a run, and the self-check."""
