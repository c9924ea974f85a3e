# SPDX-License-Identifier: Apache-2.0
"""Glue between cenote and inference engines, one module an engine; nothing imports them."""
