# SPDX-License-Identifier: Apache-2.0
"""What processes on one host must agree on: objects, layouts, messages, names."""
