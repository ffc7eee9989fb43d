"""Tests of what clipweld promises when files, images, servers, disks or processes fail.

Each module is a command that causes failures many times and exits with status 1 if a promise is broken. TRUST.md has
the results.
"""
