"""One table of scenarios of Keras's training, run on one device, on replicas and on workers."""
