// Reads an eStargz blob with upstream's own library.
//
// Usage: estargz BLOB TOC-DIGEST
//
// Verifies the TOC against the digest and every chunk against the TOC, reads every file, and
// prints one line for each name: path, type, size, number of links, SHA-256 of the content or
// the target of a link, separated by tabs. Any difference ends it with status 1.
package main

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path"
	"sort"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"
)

func main() {
	if err := run(os.Args[1], digest.Digest(os.Args[2])); err != nil {
		fmt.Fprintln(os.Stderr, "estargz:", err)
		os.Exit(1)
	}
}

func run(blob string, toc digest.Digest) error {
	file, err := os.Open(blob)
	if err != nil {
		return err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return err
	}
	reader, err := estargz.Open(io.NewSectionReader(file, 0, info.Size()))
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	verifier, err := reader.VerifyTOC(toc)
	if err != nil {
		return fmt.Errorf("verify TOC: %w", err)
	}
	root, ok := reader.Lookup("")
	if !ok {
		return fmt.Errorf("no root")
	}
	return walk(reader, verifier, "", root)
}

func walk(r *estargz.Reader, v estargz.TOCEntryVerifier, name string, entry *estargz.TOCEntry) error {
	detail := entry.LinkName
	if entry.Type == "reg" {
		// A hard link is shown as the entry it names, and only that one has chunks.
		sum, err := read(r, v, entry.Name, entry)
		if err != nil {
			return fmt.Errorf("%q: %w", name, err)
		}
		detail = sum
	}
	fmt.Printf("%q\t%s\t%d\t%d\t%s\n", name, entry.Type, entry.Size, entry.NumLink, detail)

	children := map[string]*estargz.TOCEntry{}
	var names []string
	entry.ForeachChild(func(base string, child *estargz.TOCEntry) bool {
		children[base] = child
		names = append(names, base)
		return true
	})
	sort.Strings(names)
	for _, base := range names {
		if err := walk(r, v, path.Join(name, base), children[base]); err != nil {
			return err
		}
	}
	return nil
}

func read(r *estargz.Reader, v estargz.TOCEntryVerifier, name string, entry *estargz.TOCEntry) (string, error) {
	whole := sha256.New()
	for at := int64(0); at < entry.Size; {
		chunk, ok := r.ChunkEntryForOffset(name, at)
		if !ok || chunk.ChunkOffset != at || chunk.ChunkSize <= 0 {
			return "", fmt.Errorf("no chunk at %d", at)
		}
		file, err := r.OpenFile(name)
		if err != nil {
			return "", err
		}
		data := make([]byte, chunk.ChunkSize)
		if _, err := file.ReadAt(data, at); err != nil && err != io.EOF {
			return "", fmt.Errorf("read at %d: %w", at, err)
		}
		check, err := v.Verifier(chunk)
		if err != nil {
			return "", err
		}
		if _, err := io.Copy(check, bytes.NewReader(data)); err != nil {
			return "", err
		}
		if !check.Verified() {
			return "", fmt.Errorf("chunk at %d does not match its digest", at)
		}
		whole.Write(data)
		at += chunk.ChunkSize
	}
	return fmt.Sprintf("%x", whole.Sum(nil)), nil
}
