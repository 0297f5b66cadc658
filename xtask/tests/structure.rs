//! The structure of the code: modules of a crate form layers, without import cycles.
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use syn::visit::Visit;

/// Source directories of all crates.
const CRATES: [&str; 8] =
    ["agent/src", "bench/src", "common/src", "core/src", "datapath/src", "ebpf/src", "tests/src", "xtask/src"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// A module: its path from the root of the crate, and whether its children are in a directory of its own.
type Module = Vec<String>;

/// All modules of a crate, with their files. Tests do not count.
fn modules(source: &Path) -> BTreeMap<Module, PathBuf> {
    let mut found = BTreeMap::new();
    let mut directories = vec![source.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
                continue;
            }
            let within = path.strip_prefix(source).unwrap().with_extension("");
            let mut module: Module = within.iter().map(|part| part.to_str().unwrap().to_owned()).collect();
            if module.last().is_some_and(|last| ["mod", "lib", "main"].contains(&last.as_str())) {
                module.pop();
            }
            if path.extension().is_some_and(|it| it == "rs") && !module.iter().any(|part| part == "tests") {
                found.insert(module, path);
            }
        }
    }
    found
}

/// Collects the absolute paths that a module refers to.
struct References {
    module: Module,
    found: BTreeSet<Module>,
}

impl References {
    /// Resolves `crate`, `super` and `self`; other paths lead to other crates or to children.
    fn add(&mut self, path: &[String]) {
        let Some(first) = path.first() else { return };
        let mut base = match first.as_str() {
            "crate" => Vec::new(),
            "self" => self.module.clone(),
            "super" => self.module[..self.module.len().saturating_sub(1)].to_vec(),
            _ => return,
        };
        let supers = path[1..].iter().take_while(|part| *part == "super").count();
        base.truncate(base.len().saturating_sub(supers));
        base.extend(path[1 + supers..].iter().cloned());
        self.found.insert(base);
    }

    fn add_tree(&mut self, prefix: &[String], tree: &syn::UseTree) {
        let with = |name: &syn::Ident| [prefix, &[name.to_string()]].concat();
        match tree {
            syn::UseTree::Path(path) => self.add_tree(&with(&path.ident), &path.tree),
            syn::UseTree::Name(name) => self.add(&with(&name.ident)),
            syn::UseTree::Rename(name) => self.add(&with(&name.ident)),
            syn::UseTree::Glob(_) => self.add(prefix),
            syn::UseTree::Group(group) => group.items.iter().for_each(|tree| self.add_tree(prefix, tree)),
        }
    }
}

fn is_test(attributes: &[syn::Attribute]) -> bool {
    let is_test = |list: &syn::MetaList| list.path.is_ident("cfg") && list.tokens.to_string().contains("test");
    attributes.iter().any(|attribute| attribute.meta.require_list().is_ok_and(is_test))
}

impl<'ast> Visit<'ast> for References {
    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        if !is_test(&item.attrs) {
            syn::visit::visit_item_mod(self, item);
        }
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        if !is_test(&item.attrs) {
            self.add_tree(&[], &item.tree);
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let parts: Vec<String> = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        self.add(&parts);
        syn::visit::visit_path(self, path);
    }
}

/// Which modules each module refers to. A path that goes on below a module means that module.
fn references(source: &Path) -> BTreeMap<Module, BTreeSet<Module>> {
    let modules = modules(source);
    let of = |(module, file): (&Module, &PathBuf)| {
        let syntax = syn::parse_file(&fs::read_to_string(file).unwrap()).unwrap();
        let mut references = References { module: module.clone(), found: BTreeSet::new() };
        references.visit_file(&syntax);
        let longest = |path: &Module| {
            (0..=path.len()).rev().map(|length| path[..length].to_vec()).find(|it| modules.contains_key(it))
        };
        (module.clone(), references.found.iter().filter_map(longest).collect())
    };
    modules.iter().map(of).collect()
}

/// Returns a cycle among the children of `parent`, where what is below a child belongs to it.
fn cycle(references: &BTreeMap<Module, BTreeSet<Module>>, parent: &[String]) -> Option<Vec<String>> {
    let child = |module: &Module| {
        (module.len() > parent.len() && module.starts_with(parent)).then(|| module[parent.len()].clone())
    };
    let mut edges: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (module, to) in references {
        let Some(from) = child(module) else { continue };
        let to = to.iter().filter_map(child).filter(|to| *to != from);
        edges.entry(from.clone()).or_default().extend(to);
    }
    // Removes what refers to nothing that is left, until all that is left is in a cycle or leads to one.
    while let Some(leaf) = edges.iter().find(|(_, to)| to.is_empty()).map(|(from, _)| from.clone()) {
        edges.remove(&leaf);
        for to in edges.values_mut() {
            to.remove(&leaf);
        }
    }
    let mut path = vec![edges.keys().next()?.clone()];
    loop {
        let next = edges[path.last()?].first()?.clone();
        if let Some(at) = path.iter().position(|it| *it == next) {
            path.drain(..at);
            return Some(path);
        }
        path.push(next);
    }
}

#[test]
fn modules_have_no_import_cycles() {
    let mut cycles = Vec::new();
    for directory in CRATES {
        let references = references(&root().join(directory));
        assert!(references.len() > 1, "{directory} has modules");
        let parents: BTreeSet<&[String]> =
            references.keys().filter(|module| !module.is_empty()).map(|it| &it[..it.len() - 1]).collect();
        for parent in parents {
            if let Some(cycle) = cycle(&references, parent) {
                cycles.push(format!("{directory}/{}: {}", parent.join("/"), cycle.join(" → ")));
            }
        }
    }
    assert!(cycles.is_empty(), "modules that import each other:\n{}", cycles.join("\n"));
}

#[test]
fn cycle_is_found() {
    let module = |text: &str| text.split('/').map(str::to_owned).collect::<Module>();
    let references = BTreeMap::from([
        (module("a"), BTreeSet::from([module("b/x")])),
        (module("b/x"), BTreeSet::from([module("c")])),
        (module("c"), BTreeSet::from([module("b")])),
    ]);
    assert_eq!(cycle(&references, &[]), Some(vec!["b".to_owned(), "c".to_owned()]));
    assert_eq!(cycle(&references, &module("b")), None);
}
