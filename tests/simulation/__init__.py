"""Engine, journal and fleet in a world without clocks, threads and disks: what holds in every order of events, by seed.
`test_simulation.py` says what must hold; `world.py` is what the real engine stands on here, `process.py` runs it.
"""
