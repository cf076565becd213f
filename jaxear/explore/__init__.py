"""Eigenears in the browser: `jaxear explore --run runs/NAME`."""
