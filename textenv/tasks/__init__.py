"""One file per id: its data, its reward, its registration."""
