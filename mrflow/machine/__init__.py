"""The machine below: devices and their clocks, forked processes, signals, memory that ran out, names of hardware."""
