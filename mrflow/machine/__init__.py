"""The machine below: devices and their clocks, forked processes, signals, and what to call the hardware."""
