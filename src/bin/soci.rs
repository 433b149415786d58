fn main() -> std::process::ExitCode {
    soci::cli::main()
}
