//! Entry point of the `portolan` binary; see `portolan --help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    portolan::cli::main()
}
