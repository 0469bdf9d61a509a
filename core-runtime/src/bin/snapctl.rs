//! The command line of the suite; see `core_runtime::cli`.

fn main() -> std::process::ExitCode {
    core_runtime::cli::main()
}
