//! Messages between init and hostd, carried over D-Bus on a private socket.
