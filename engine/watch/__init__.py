"""Signs of life: how ranks find out that one of them is gone, hangs or was replaced, name it, and end in time.

Each rank has a guard, a small process that ends it when its interpreter stands still (``guard.py``); threads beside
the training thread exchange beats over a store (``roll.py``) and end the rank when others are gone (``watch.py``).
"""

from engine.watch.watch import Watch

__all__ = ["Watch"]
