//! What to measure: `key=value` words.

use crate::support::engine::Kind;
use crate::support::link::Shape;
use crate::support::workload::SUITE;
use std::path::PathBuf;

pub const USAGE: &str = "\
bench [key=value]…
  sections=pull,full,…      what to measure: pull eager full ztoc index reads mount
  images=redis,numpy,…      of: redis nginx numpy node postgres rabbitmq ffmpeg tensorflow torch gigabyte
  engines=ctd2,ours,…       of: ctd16 ctd2 ctd2par docker ours ours16 fallback
  links=region,zone         region: 500 Mbit/s, 10 ms each way; zone: 2 Gbit/s, 1 ms; unshaped; or MBIT:MICROSECONDS
  n=2                       runs of each, interleaved
  min_layer=BYTES           `soci convert --min-layer-size` (its default if not given)
  config=FILE               TOML to put first in our daemon's configuration
  out=DIR                   where the report goes (target/bench)
  keep=DIR                  where our daemon's logs of each run are kept";

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Section {
    Pull,
    Eager,
    Full,
    Ztoc,
    Index,
    Reads,
    Mount,
}

impl Section {
    const ALL: [(&str, Section); 7] = [
        ("pull", Section::Pull),
        ("eager", Section::Eager),
        ("full", Section::Full),
        ("ztoc", Section::Ztoc),
        ("index", Section::Index),
        ("reads", Section::Reads),
        ("mount", Section::Mount),
    ];
}

pub struct Options {
    pub sections: Vec<Section>,
    images: Option<Vec<String>>,
    engines: Option<Vec<Kind>>,
    links: Option<Vec<Shape>>,
    pub runs: usize,
    pub min_layer: Option<u64>,
    pub config: String,
    pub out: PathBuf,
    pub keep: Option<PathBuf>,
}

impl Options {
    pub fn parse(arguments: impl Iterator<Item = String>) -> Result<Options, String> {
        let target = PathBuf::from(env!("CARGO_BIN_EXE_soci"));
        let target = target.ancestors().nth(2).expect("a binary is in <target>/<profile>/").to_path_buf();
        let mut options = Options {
            sections: Section::ALL.map(|(_, s)| s).to_vec(),
            images: None,
            engines: None,
            links: None,
            runs: 2,
            min_layer: None,
            config: String::new(),
            out: target.join("bench"),
            keep: None,
        };
        for argument in arguments {
            // Cargo and its users pass flags of the standard harness; they mean nothing here.
            if argument.starts_with("--") {
                continue;
            }
            let (key, value) = argument.split_once('=').ok_or_else(|| format!("'{argument}' is not key=value"))?;
            let words = || value.split(',').filter(|w| !w.is_empty());
            match key {
                "sections" => options.sections = words().map(section).collect::<Result<_, _>>()?,
                "images" => options.images = Some(words().map(image).collect::<Result<_, _>>()?),
                "engines" => {
                    let kind = |word: &str| Kind::parse(word).ok_or_else(|| format!("no engine '{word}'"));
                    options.engines = Some(words().map(kind).collect::<Result<_, _>>()?);
                }
                "links" => options.links = Some(words().map(shape).collect::<Result<_, _>>()?),
                "n" => options.runs = number(value)? as usize,
                "min_layer" => options.min_layer = Some(number(value)?),
                "config" => options.config = std::fs::read_to_string(value).map_err(|e| format!("{value}: {e}"))?,
                "out" => options.out = value.into(),
                "keep" => options.keep = Some(value.into()),
                _ => return Err(format!("no option '{key}'")),
            }
        }
        Ok(options)
    }

    /// What `section` runs on which link: what was asked for, or else all of the suite where the targets are stated and a few elsewhere,
    /// so that the whole report takes half an hour.
    pub fn plan(&self, section: Section) -> Vec<(Shape, Vec<String>)> {
        let links = self.links.clone().unwrap_or_else(|| match section {
            Section::Pull => vec![Shape::REGION, Shape::ZONE],
            Section::Eager => vec![Shape::REGION, Shape::ZONE, Shape::NONE],
            _ => vec![Shape::REGION],
        });
        let images = |shape: Shape| {
            let default: &[&str] = match section {
                Section::Pull | Section::Eager if shape == Shape::REGION => {
                    &["redis", "numpy", "node", "postgres", "rabbitmq", "ffmpeg", "tensorflow"]
                }
                Section::Pull | Section::Eager => &["redis", "ffmpeg", "tensorflow"],
                Section::Ztoc | Section::Index => &["ffmpeg", "tensorflow"],
                _ => &["numpy", "ffmpeg"],
            };
            self.images.clone().unwrap_or_else(|| default.iter().map(|i| i.to_string()).collect())
        };
        links.into_iter().map(|shape| (shape, images(shape))).collect()
    }

    pub fn engines(&self, section: Section) -> Vec<Kind> {
        self.engines.clone().unwrap_or_else(|| match section {
            Section::Pull => vec![Kind::Ctd2, Kind::Ctd16, Kind::Docker, Kind::Ours],
            Section::Eager => vec![Kind::Ctd2, Kind::Ctd16, Kind::Docker, Kind::Fallback],
            _ => vec![Kind::Ctd2, Kind::Ours],
        })
    }
}

fn section(word: &str) -> Result<Section, String> {
    Section::ALL.into_iter().find(|(n, _)| *n == word).map(|(_, s)| s).ok_or_else(|| format!("no section '{word}'"))
}

fn image(word: &str) -> Result<String, String> {
    if SUITE.iter().any(|w| w.image == word) { Ok(word.to_string()) } else { Err(format!("no image '{word}'")) }
}

fn number(word: &str) -> Result<u64, String> {
    word.parse().map_err(|_| format!("'{word}' is not a number"))
}

fn shape(word: &str) -> Result<Shape, String> {
    match word {
        "region" => Ok(Shape::REGION),
        "zone" => Ok(Shape::ZONE),
        "unshaped" | "none" => Ok(Shape::NONE),
        _ => {
            let (mbit, delay) = word.split_once(':').ok_or_else(|| format!("'{word}' is no link"))?;
            Ok(Shape { mbit: number(mbit)? as u32, delay_us: number(delay)? as u32 })
        }
    }
}
