//! The one instruction that the bench needs and Rust calls unsafe.

/// The processor's cycle counter. Under the repeatable clock it counts nanoseconds since power-on.
pub fn cycles() -> u64 {
    // SAFETY: reads a counter and touches no memory; every x86-64 processor has the instruction.
    unsafe { std::arch::x86_64::_rdtsc() }
}
