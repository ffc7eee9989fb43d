"""What clipweld promises when files, images, servers, disks and processes go wrong, put to the test.

Each module is a command that breaks things many times over and ends with status 1 if a promise does not hold. TRUST.md
has what they found.
"""
