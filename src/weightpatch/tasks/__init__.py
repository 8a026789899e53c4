"""What weightpatch is measured and demonstrated on: data, models and thin adapters, one package a kind of task."""
