package ingest

import _ "embed"

const openAPIPath = "/openapi.json"

// openAPI describes the public API for clients and their tools.
//
//go:embed openapi.json
var openAPI []byte
