# SPDX-License-Identifier: Apache-2.0
"""
The raw binding of the C core.  Only `cenote.shm` and `cenote.numa` import it.

`_core` releases the GIL around each call, `_short` has the same functions and keeps it, `_lease` is
the lease as an object with the buffer protocol.  `errors` maps status codes to exceptions.
"""
