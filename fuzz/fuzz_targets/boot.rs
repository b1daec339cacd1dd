#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| blxrep::fuzzing::check("boot", bytes));
