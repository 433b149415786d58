//! The report: Markdown for people, every single measurement as JSON beside it. Rewritten after each section, so that an interrupted run leaves one.

use crate::options::Options;
use serde_json::{Value, json};
use std::path::PathBuf;

pub struct Report {
    dir: PathBuf,
    head: String,
    sections: Vec<String>,
    records: Vec<Value>,
}

impl Report {
    pub fn new(options: &Options) -> Report {
        std::fs::create_dir_all(&options.out).unwrap();
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let cpu = read("/proc/cpuinfo")
            .lines()
            .find_map(|l| l.strip_prefix("model name").map(|v| v.trim_start_matches(['\t', ' ', ':']).to_string()));
        let head = format!(
            "# Bench\n\n{} cores of {}, Linux {}. Every run on a fresh ext4; the engines take turns; the registry is behind real TCP on a shaped link.\n",
            std::thread::available_parallelism().map_or(0, usize::from),
            cpu.unwrap_or_else(|| "unknown".into()),
            read("/proc/sys/kernel/osrelease").trim(),
        );
        Report { dir: options.out.clone(), head, sections: Vec::new(), records: Vec::new() }
    }

    /// A line about the circumstances, said once.
    pub fn note(&mut self, text: &str) {
        if !self.head.contains(text) {
            self.head += &format!("{text}\n");
        }
    }

    /// One measurement.
    pub fn record(&mut self, record: Value) {
        self.records.push(record);
        self.write();
    }

    /// A finished section, in Markdown.
    pub fn section(&mut self, text: &str) {
        self.sections.push(text.to_string());
        self.write();
    }

    pub fn markdown(&self) -> String {
        format!("{}\n{}", self.head, self.sections.join("\n"))
    }

    pub fn path(&self) -> PathBuf {
        self.dir.join("report.md")
    }

    fn write(&self) {
        std::fs::write(self.path(), self.markdown()).unwrap();
        std::fs::write(self.dir.join("report.json"), serde_json::to_vec(&json!({"records": self.records})).unwrap())
            .unwrap();
    }
}

/// NaN of nothing.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[n / 2],
        n => (values[n / 2 - 1] + values[n / 2]) / 2.0,
    }
}

/// A Markdown table.
pub fn table(head: &[String], rows: &[Vec<String>]) -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let mut out = line(head);
    out += &line(&vec!["---".to_string(); head.len()]);
    rows.iter().for_each(|row| out += &line(row));
    out
}
