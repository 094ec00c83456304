//! Machine config v1: the one file that describes a host.
