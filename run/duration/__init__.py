"""How long a run will take on this machine: short timed probes, and the counts of the plan."""
