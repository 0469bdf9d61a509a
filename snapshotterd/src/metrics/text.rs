//! The text exposition format, version 0.0.4.

use std::{collections::BTreeMap, fmt::Write as _, sync::atomic::Ordering};

use super::{BOUNDS_US, Def, Family, Value};

pub(super) fn render(
    families: &BTreeMap<&'static str, Family>,
    samples: Vec<(&'static Def, Vec<String>, f64)>,
) -> String {
    let mut blocks: BTreeMap<&'static str, (&'static Def, Vec<String>)> = BTreeMap::new();
    for family in families.values() {
        let lines = &mut blocks
            .entry(family.def.name)
            .or_insert_with(|| (family.def, Vec::new()))
            .1;
        for (labels, value) in &family.series {
            series(family.def, labels, value, lines);
        }
    }
    for (def, labels, value) in samples {
        let line = format!("{}{} {value}", def.name, braces(def, &labels, None));
        blocks
            .entry(def.name)
            .or_insert_with(|| (def, Vec::new()))
            .1
            .push(line);
    }
    let mut out = String::new();
    for (name, (def, lines)) in blocks {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "# HELP {name} {}", def.help);
        let _ = writeln!(out, "# TYPE {name} {}", def.shape.name());
        for line in lines {
            out.push_str(&line);
            out.push('\n');
        }
    }
    out
}

fn series(def: &Def, labels: &[String], value: &Value, lines: &mut Vec<String>) {
    let name = def.name;
    let plain = braces(def, labels, None);
    match value {
        Value::Counter(counter) => lines.push(format!("{name}{plain} {}", counter.value())),
        Value::Gauge(gauge) => lines.push(format!("{name}{plain} {}", gauge.value())),
        Value::Histogram(histogram) => {
            let mut total = 0;
            let bounds = BOUNDS_US
                .iter()
                .map(|us| seconds(*us))
                .chain(["+Inf".to_owned()]);
            for (bound, count) in bounds.zip(&histogram.0.counts) {
                total += count.load(Ordering::Relaxed);
                let with_bound = braces(def, labels, Some(&bound));
                lines.push(format!("{name}_bucket{with_bound} {total}"));
            }
            let sum = seconds(histogram.0.sum_us.load(Ordering::Relaxed));
            lines.push(format!("{name}_sum{plain} {sum}"));
            lines.push(format!("{name}_count{plain} {total}"));
        }
    }
}

/// Microseconds as decimal seconds, exactly.
fn seconds(us: u64) -> String {
    let text = format!("{}.{:06}", us / 1_000_000, us % 1_000_000);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn braces(def: &Def, values: &[String], bound: Option<&str>) -> String {
    let pairs: Vec<_> = def
        .labels
        .iter()
        .copied()
        .zip(values.iter().map(String::as_str))
        .chain(bound.map(|bound| ("le", bound)))
        .map(|(name, value)| format!("{name}=\"{}\"", escape(value)))
        .collect();
    if pairs.is_empty() {
        String::new()
    } else {
        format!("{{{}}}", pairs.join(","))
    }
}

fn escape(value: &str) -> String {
    value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}
