#![no_main]

#[path = "../bodies.rs"]
#[expect(dead_code, reason = "every target uses one body")]
mod bodies;

libfuzzer_sys::fuzz_target!(|data: &[u8]| bodies::oci(data));
