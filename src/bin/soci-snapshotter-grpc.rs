fn main() -> std::process::ExitCode {
    soci::daemon::main()
}
