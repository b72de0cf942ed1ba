"""Whether replicas train a model as one device does, and if not, where they depart and why."""
