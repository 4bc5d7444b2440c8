"""Tries to catch the software lying: attacks on its own mechanisms and releases, and what they prove. An audit can refute, not confirm.

`bounds` and `result` know no torch; the rest runs real code on made-up or public data. Nothing here sees a private record of a user.
"""
