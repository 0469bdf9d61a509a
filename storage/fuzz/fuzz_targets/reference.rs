#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| storage::registry::fuzzing::reference(data));
