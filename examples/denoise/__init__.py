"""Wrong labels found by learning one weight per training sample."""
