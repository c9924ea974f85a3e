# SPDX-License-Identifier: Apache-2.0
"""The service: it owns the memory of its pools and lends it to the engines of this host."""
