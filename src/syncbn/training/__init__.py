"""The main job: train a real classifier on replicas and compare it with one device."""
