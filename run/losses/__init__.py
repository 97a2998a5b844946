"""Losses of every option of every unit: in the method's own metric, in nats by probes, and scores that rules read."""
